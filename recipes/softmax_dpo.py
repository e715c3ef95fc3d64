# SPDX-License-Identifier: Apache-2.0
"""
Softmax DPO on a trained recommender: `trl_msl.scripts.dpo`.

```bash
accelerate launch recipes/softmax_dpo.py --model_name_or_path outputs/quickstart/msl --output_dir outputs/softmax_dpo
```
"""

from trl_msl.scripts.dpo import run


if __name__ == "__main__":
    run()
