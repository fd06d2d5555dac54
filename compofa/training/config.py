"""A run's whole configuration: frozen, checked at once, written beside the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from compofa.backbones import Backbone
from compofa.coupling import parse_coupling
from compofa.data import dataset_info
from compofa.errors import CompofaError, ConfigError
from compofa.model_zoo import network_spec
from compofa.network import NetworkSpec
from compofa.training.recipes import REFERENCE_BATCH, Phase, recipe_for
