# SPDX-License-Identifier: Apache-2.0
"""
The quickstart: [`compare_losses`] with the options of `quickstart.yaml`, on generated data with a small model, offline
and in a few minutes on a CPU. Options on the command line replace those of the file.

```bash
trl-msl quickstart
```
"""

import sys

from ..scripts.command_line import QUICKSTART
from . import compare_losses


def run(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    compare_losses.run(["--config", str(QUICKSTART), *arguments])


if __name__ == "__main__":
    run()
