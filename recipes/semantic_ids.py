# SPDX-License-Identifier: Apache-2.0
"""
python recipes/semantic_ids.py --model_name_or_path Qwen/Qwen3-0.6B --items items.csv --output_dir outputs/semantic
"""

from trl_msl.scripts.semantic_ids import run


if __name__ == "__main__":
    run()
