"""The command line. Nothing heavy is imported here: `trimtab --help` answers at once."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `trimtab` script."""
    from trimtab.compiler.cli.app import app
    from trimtab.compiler.cli.console import catch_sigterm, print_any_text

    catch_sigterm()
    print_any_text()
    app(prog_name="trimtab")
