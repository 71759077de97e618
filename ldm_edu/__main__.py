"""`python -m ldm_edu` is the `ldm-edu` command: the form in which torchrun and accelerate start it."""
from .cli import main

raise SystemExit(main())
