# SPDX-License-Identifier: Apache-2.0
"""What only measurements need: generated data, small models made from nothing, ablations."""
