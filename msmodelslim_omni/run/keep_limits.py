"""The bytes that `keep` may spend, and what each Linear would cost. From the plan only."""

from __future__ import annotations

from ..errors import QuantError
from ..formats import FORMATS, OutLinear, format_tensors
from ..plan import Keep, QuantPlan
from .assembly import make_job


def keep_budget(plan: QuantPlan, keep: Keep) -> int:
    """The bytes that the output may grow by; of the smallest output, where a run writes several formats."""
    job = make_job(plan)
    sizes = [sum(tensor.spec.nbytes for tensor in format_tensors(FORMATS[saver.type], job)) for saver in plan.savers]
    return keep.limits.extra_bytes(min(sizes))


def extra_bytes(plan: QuantPlan, keep: Keep) -> dict[str, int]:
    """Bytes that each Linear takes more in the better precision, by full name; the most of all formats."""
    better = {item.name: item for item in make_job(plan.keeping(keep.names, keep)).items if isinstance(item, OutLinear)}
    extra: dict[str, int] = {}
    for item in make_job(plan).items:
        if not isinstance(item, OutLinear) or item.name not in keep.names:
            continue
        for saver in plan.savers:
            written = FORMATS[saver.type]
            before = sum(tensor.spec.nbytes for tensor in written.linear_tensors(item))
            if keep.better is None:
                after = plan.checkpoint.tensors[f"{item.name}.weight"].nbytes
            else:
                after = sum(tensor.spec.nbytes for tensor in written.linear_tensors(better[item.name]))
            extra[item.name] = max(extra.get(item.name, after - before), after - before)
    return extra


def check_keep(plan: QuantPlan) -> None:
    """Raise QuantError if a linear_quant may leave all of its Linears float, so that it would quantize nothing, and if
    tuning meets int8 Linears."""
    for keep in plan.keep:
        if keep.better is not None and plan.tunes:
            raise QuantError(
                f"{keep.where}: --effort best tunes 4-bit and float Linears only, and keep would make some W8A16",
                "use as: float, or leave --effort out",
            )
        if keep.better is None and sum(extra_bytes(plan, keep).values()) <= keep_budget(plan, keep):
            raise QuantError(
                f"{keep.where}: max_extra_bytes {keep.limits.max_extra_bytes} is enough to leave every Linear float",
                "give less, or remove this linear_quant",
            )
