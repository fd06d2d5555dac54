"""Elastic operators of supernets and the static blocks that subnets are made of."""
