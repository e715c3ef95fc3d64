# SPDX-License-Identifier: Apache-2.0
"""
The quickstart: [`compare_losses`] on generated data with a small model, by `quickstart.yaml`, offline and in a few
minutes on a CPU.

```bash
trl-msl quickstart
```

Options on the command line go before those of the file.
"""

import sys

from ..scripts.command_line import QUICKSTART
from . import compare_losses


def run(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    compare_losses.run(["--config", str(QUICKSTART), *arguments])


if __name__ == "__main__":
    run()
