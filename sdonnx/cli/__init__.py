"""The command line. app.py registers the commands of commands/; the other modules are shared by them."""
