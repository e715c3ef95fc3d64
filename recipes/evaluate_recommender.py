# SPDX-License-Identifier: Apache-2.0
"""accelerate launch recipes/evaluate_recommender.py --model_name_or_path outputs/quickstart/msl"""

from trl_msl.scripts.evaluate import run


if __name__ == "__main__":
    run()
