"""Muon for the matrices of layers and AdamW for everything else, as one optimizer.

PyTorch's `torch.optim.Muon` accepts 2-D parameters only and raises a ValueError for
biases, norms and convolutions, so AdamW has to update those. PyTorch has no optimizer that
combines the two; this class is that combination, and does no arithmetic of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from onewan.config.optimizer import MuonOptimizer


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on matrices and `torch.optim.AdamW` on all other parameters.

    Each parameter group is divided in two, which keep its learning rate and other entries. A group
    with a true entry `embeddings` is updated by AdamW entirely: Muon is for the weight matrices of
    layers (kellerjordan.github.io/posts/muon).
    """

    def __init__(self, groups: list[dict[str, Any]], choice: MuonOptimizer) -> None:
        divided: list[dict[str, Any]] = []
        for group in groups:
            entries = {key: value for key, value in group.items() if key != "params"}
            is_layers = not group.get("embeddings", False)
            for is_muon in (True, False):
                chosen = [p for p in group["params"] if (is_layers and p.ndim == 2) is is_muon]
                if chosen:
                    divided.append({**entries, "params": chosen, "muon": is_muon})
        # torch's constructor checks the groups; it has no defaults, since each group is complete.
        super().__init__(divided, {})
        matrices = [group for group in self.param_groups if group["muon"]]
        others = [group for group in self.param_groups if not group["muon"]]
        self._optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                matrices,
                momentum=choice.momentum,
                nesterov=choice.nesterov,
                ns_steps=choice.ns_steps,
                weight_decay=choice.weight_decay,
                adjust_lr_fn="match_rms_adamw" if choice.match_adamw else "original",
            )
            self._optimizers.append(muon)
        if others:
            self._optimizers.append(
                torch.optim.AdamW(others, weight_decay=choice.weight_decay, fused=True)
            )
        # The two share their groups and state with this object, so that a learning rate set here
        # is the one that they use, and `state` has the entries of both.
        self.param_groups = [group for each in self._optimizers for group in each.param_groups]
        for each in self._optimizers:
            each.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share the new groups and state, which torch's `load_state_dict` assigns to `self`."""
        super().__setstate__(state)
        for each in self._optimizers:
            is_muon = isinstance(each, torch.optim.Muon)
            each.param_groups = [g for g in self.param_groups if g["muon"] is is_muon]
            each.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        del closure
        for each in self._optimizers:
            each.step()
