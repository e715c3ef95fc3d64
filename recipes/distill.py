# SPDX-License-Identifier: Apache-2.0
"""python recipes/distill.py --model_name_or_path outputs/mine/msl --output_dir outputs/mine/distilled"""

from trl_msl.scripts.distill import run


if __name__ == "__main__":
    run()
