"""What each `modeseek` subcommand does. Parsing is `actors/main.py`'s, looks are `actors/cli`'s."""
