"""`python -m trimtab.compiler.cli`: the same as the `trimtab` script."""

from trimtab.compiler.cli import main

main()
