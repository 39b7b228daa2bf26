"""Who may use the server, and how much of it one request takes.

access      which hosts, origins and tokens the settings allow
limits      how many values JSON may have
middleware  what stands between a client and the routes
"""
