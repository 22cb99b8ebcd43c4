"""The command line: options, endings, one file a subcommand."""
