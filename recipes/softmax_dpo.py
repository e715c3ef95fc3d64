# SPDX-License-Identifier: Apache-2.0
"""accelerate launch recipes/softmax_dpo.py --model_name_or_path outputs/quickstart/msl --output_dir outputs/dpo"""

from trl_msl.scripts.dpo import run


if __name__ == "__main__":
    run()
