"""The sub-commands of ``ivt``; each module offers ``add_arguments(parser)`` and ``run(args)``."""
