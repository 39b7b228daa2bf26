"""More than one machine: batches and a server's jobs on a Ray cluster.

    connection  the cluster that a command uses
    resources   how many actors there are, with how many threads and how much memory
    packages    what pipelines open, the same on every node
    actors      pipelines on nodes, and the requests that each takes when it is free
    storage     images at a URL
    scaling     how many replicas there are for ``sdonnx serve``
    serving     a server's jobs, which replicas run
    replica     pipelines on a node, for those jobs
    orders      what a server and its replicas tell each other

Only this imports Ray, and only the subcommands that need it import this.
"""
