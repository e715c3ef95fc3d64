# SPDX-License-Identifier: Apache-2.0
"""
Fine-tune an LLM with the masked softmax loss, and evaluate it: `trl_msl.scripts.train`.

```bash
accelerate launch recipes/sft_msl.py --interactions log.parquet --items items.csv --conversational \
    --model_name_or_path Qwen/Qwen3-0.6B --use_peft --output_dir outputs/mine
```

Without data options it compares losses on generated data with a small model, offline and in a few minutes on a CPU:
`trl_msl.experiments.quickstart`.
"""

import sys

from trl_msl.experiments import quickstart
from trl_msl.scripts import train


if __name__ == "__main__":
    names_data = {"--config", "--data_dir", "--interactions"} & {option.split("=")[0] for option in sys.argv[1:]}
    (train if names_data else quickstart).run()
