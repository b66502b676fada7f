"""Where the package meets its hosts: one module per host, one registry, one applier."""
