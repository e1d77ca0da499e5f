"""Methods as their authors would write them, which are not part of the package: they try words that
no registered method needs yet. `tests/test_authored.py` registers them while it runs."""
