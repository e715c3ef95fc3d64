# SPDX-License-Identifier: Apache-2.0
"""
The quickstart: [`compare_losses`] with the options of `quickstart.yaml`, on generated data with a small model, offline
and in a few minutes on a CPU. Options on the command line replace those of the file.

```bash
trl-msl quickstart
```
"""

from pathlib import Path

from ..scripts.command_line import command
from .compare_losses import main


run = command(main, model_is_optional=True, config=Path(__file__).with_suffix(".yaml"), doc=__doc__)


if __name__ == "__main__":
    run()
