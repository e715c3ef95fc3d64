# SPDX-License-Identifier: Apache-2.0
"""accelerate launch recipes/baselines.py --model sasrec-softmax --output_dir outputs/quickstart/sasrec-softmax"""

from trl_msl.scripts.baselines import run


if __name__ == "__main__":
    run()
