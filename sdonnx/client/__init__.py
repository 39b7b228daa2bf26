"""A client of ``sdonnx serve`` on other machines, with the standard library's HTTP.

    connection  HTTP with one server, and what its errors mean
    server      one server's models, jobs and images
    pool        many requests over several servers

Only the subcommands that need it import it.
"""
