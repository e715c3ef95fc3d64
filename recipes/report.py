# SPDX-License-Identifier: Apache-2.0
"""
Compare systems that ranked the same test split: `trl_msl.scripts.report`.

```bash
python recipes/report.py --runs outputs/quickstart --reference msl
```
"""

from trl_msl.scripts.report import run


if __name__ == "__main__":
    run()
