# SPDX-License-Identifier: Apache-2.0
"""accelerate launch recipes/recommend.py --model_name_or_path outputs/quickstart/msl --users users.parquet"""

from trl_msl.scripts.recommend import run


if __name__ == "__main__":
    run()
