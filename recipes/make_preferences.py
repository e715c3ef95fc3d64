# SPDX-License-Identifier: Apache-2.0
"""
Write preference rows: `trl_msl.scripts.preferences`.

```bash
accelerate launch recipes/make_preferences.py --model_name_or_path outputs/quickstart/msl \
    --negatives model --num_negatives 3 --pairs --output_dir outputs/preferences
```
"""

from trl_msl.scripts.preferences import run


if __name__ == "__main__":
    run()
