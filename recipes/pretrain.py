# SPDX-License-Identifier: Apache-2.0
"""
accelerate launch recipes/pretrain.py --config recipes/configs/pretrain.yaml \
    --data_dir data/Book --empty_texts keep --output_dir outputs/book/base
"""

from trl_msl.experiments.pretrain import run


if __name__ == "__main__":
    run()
