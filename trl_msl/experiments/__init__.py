# SPDX-License-Identifier: Apache-2.0
"""For measurements only: small models made from scratch, comparisons of losses, ablations."""
