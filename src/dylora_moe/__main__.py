"""`python -m dylora_moe` is `dylora-moe`."""

from .cli import main

main()
