# SPDX-License-Identifier: Apache-2.0
"""What only measurements need: small models made from nothing, losses compared, ablations."""
