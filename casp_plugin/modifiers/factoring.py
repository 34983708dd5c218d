"""Putting factored layers into a model."""

from compressed_tensors.offload import OffloadCache, get_cache_init_kwargs, offload_module
from torch import nn

from casp_plugin.model.latent import Latent
from casp_plugin.modifiers.base import RecipeContext
from casp_plugin.plan.plan import CompressionPlan, LowRankPlan

__all__ = ["install"]


def install(
    model: nn.Module,
    plan: CompressionPlan,
    context: RecipeContext,
    latent: Latent,
    rank: int | None,
    note: str | None = None,
) -> None:
    """Replace the layers of a latent by factors of one rank, and record it.

    :param plan: gets an entry for every layer
    :param rank: None to leave them dense
    :param note: reason, for the plan
    """
    known = rank is not None and latent.spectrum is not None
    error = latent.spectrum.error(rank) if known else None
    for name, linear in latent.linears.items():
        plan.low_rank.append(
            LowRankPlan(
                module=name,
                component=context.component_of(name),
                shape=(linear.out_features, linear.in_features),
                rank=rank,
                keep=latent.kept(rank),
                error=error,
                note=note,
            )
        )
    if rank is not None:
        for name, layer in latent.layers(rank).items():
            replaced = latent.linears[name]
            if isinstance(replaced._parameters, OffloadCache):
                for factor in layer.children():
                    offload_module(factor, **get_cache_init_kwargs(replaced))
            model.set_submodule(name, layer)
