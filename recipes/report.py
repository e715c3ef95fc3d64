# SPDX-License-Identifier: Apache-2.0
"""python recipes/report.py --runs outputs/quickstart --reference msl"""

from trl_msl.scripts.report import run


if __name__ == "__main__":
    run()
