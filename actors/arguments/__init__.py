"""What each `modeseek` subcommand takes: its options and their help. What it does is in `actors/commands`."""
