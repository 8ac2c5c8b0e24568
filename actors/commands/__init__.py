"""What each `modeseek` subcommand does. Parsing is `actors/arguments`', looks are `actors/cli`'s."""
