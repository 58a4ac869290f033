"""`python -m detr_fast` is `detr-fast`."""

import os
import sys

# `-m` puts the current folder first, which may hold anybody's files; it stays if this package lies in it.
added = not getattr(sys.flags, "safe_path", sys.flags.isolated)
if added and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]

from detr_fast.cli import main  # noqa: E402

raise SystemExit(main())
