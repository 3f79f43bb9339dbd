"""What a plan says of memory: second moments weigh as much as experts, and are told."""

from moesaic.surgery.estimate import estimate
from moesaic.surgery.planning import open_plan, plan_step
from moesaic.surgery.recipe import Step


def peak(method, **options):
    plan = plan_step(open_plan("bundled"), "quantize", method, options)
    return estimate(plan, Step("quantize", method, options))["peak_bytes"], plan.facts[0]


def test_a_layers_second_moments_are_part_of_the_memory():
    without, facts = peak("rtn", bits=4)
    assert peak("gptq", bits=4)[0] - without == 4 * facts.experts * (facts.width**2 + facts.inner**2)
    assert peak("pmq", bits=4, error="weights", rounding="nearest")[0] == without
