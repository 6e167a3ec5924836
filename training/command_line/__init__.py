"""The command line: ``indomain train | adapt | sample | inspect | convert ...``."""
