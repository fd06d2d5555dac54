"""The part of ``run_NAS.py`` that searches a trained supernet, which needs torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compofa.cli.evaluate import open_data
from compofa.errors import ConfigError
from compofa.evaluate import Evaluator
from compofa.io.open import open_network
from compofa.networks.supernet_spec import NetworkSpec
from compofa.training.device import check_device
from nas.cost.base import Cost
from nas.cost.served import default_resolutions
from nas.search import pipeline
from nas.search.folder import claim_folder
from nas.search.from_checkpoint import (
    Trained,
    measure_found,
    search_resolutions,
    trained_targets,
    verify_found,
)


def search_checkpoint(
    args: argparse.Namespace,
    output: Path,
    load_cost: Callable[..., Cost],
    check: Callable[..., object],
    run_search: Callable[..., pipeline.Outcome],
) -> pipeline.Outcome:
    """Collect records, fit a predictor, search, and measure the found subnets.

    Args:
        args: Options of ``run_NAS.py``.
        output: Folder for the results.
        load_cost: Returns the cost of a space for ``args``.
        check: Raises if ``args`` and a cost do not fit together, before anything is measured.
        run_search: Searches targets as ``args`` say.
    """
    if args.compare not in (None, ["none"], ["free"]):
        raise ConfigError(
            f"--compare: expected free or none with a checkpoint, got {' '.join(args.compare)}"
        )
    if args.width_mult is not None:
        raise ConfigError("--width-mult: a checkpoint has its own width, expected none")
    if args.verify < 0:
        raise ConfigError(f"--verify: expected a number of subnets, 0 or more, got {args.verify}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    opened = open_network(args.net)
    if not isinstance(opened.spec, NetworkSpec):
        raise ConfigError(f"--net: expected a supernet, got the specialised network {args.net}")
    resolutions = search_resolutions(opened.checkpoint, args.resolutions)
    if not args.resolutions:
        anchors = ()
        if args.accuracy_predictor is not None:
            anchors = pipeline.accuracy_model(args.accuracy_predictor).resolutions
        resolutions = default_resolutions(
            args.target_hardware, opened.spec.backbone, resolutions, anchors, args.latency_table
        )
    trained = Trained(pipeline.network_name(args.net), opened, resolutions)
    data = argparse.Namespace(dataset=None, data_path=args.data_path, imagenet_path=None)
    splits = open_data(opened.checkpoint, data)

    def cost(*of: Any) -> Cost:
        """Load the cost of a space; nothing has been measured or written in the folder by then."""
        found = load_cost(args, *of)
        search = {"net": trained.name, "checkpoint": opened.digest, "device": found.name}
        check(args, found, *of)
        claim_folder(output, search, args.overwrite)
        return found

    named: set[str] = set()

    def evaluator(part: str) -> Evaluator:
        return Evaluator(
            splits,
            part,
            normalisation=opened.normalisation,
            workers=args.workers,
            seed=args.seed,
            device=device,
            named=named,
        )

    validation, bar = evaluator("validation"), not args.quiet
    targets = trained_targets(
        trained,
        cost,
        validation,
        output,
        samples=args.samples,
        predictor=args.accuracy_predictor,
        compare=args.compare == ["free"],
        seed=args.seed,
        bar=bar,
    )
    outcome = run_search(args, targets)
    if args.verify:
        outcome = verify_found(outcome, trained, validation, output, args.verify, bar)
    return measure_found(outcome, trained, evaluator("test"), bar)
