"""Calling functions on other CPUs."""

from __future__ import annotations

import errno
import random

import pytest
from smp_machine import IF, Deadlock, SmpMachine

from emu.kernel.preempt import HARDIRQ_OFFSET, NMI_OFFSET, SOFTIRQ_DISABLE_OFFSET, SOFTIRQ_OFFSET
from emu.kernel.profile import V5_4, V6_1, V6_12
from emu.kernel.smp import CALL_FUNCTION_SINGLE_VECTOR, CALL_FUNCTION_VECTOR, CallSingleData

VERSIONS = (V6_12, V6_1, V5_4)
CPUS = (1, 2, 4, 8)
MANY, SINGLE = CALL_FUNCTION_VECTOR, CALL_FUNCTION_SINGLE_VECTOR


def of_version(profile):
    return profile.name


every_version = pytest.mark.parametrize("profile", VERSIONS, ids=of_version)


@every_version
@pytest.mark.parametrize(("cpus", "this_cpu"), [(cpus, this_cpu) for cpus in CPUS for this_cpu in range(cpus)])
@pytest.mark.parametrize("wait", [True, False])
def test_on_each_cpu_runs_the_function_once_on_every_cpu_with_interrupts_off(cpus, this_cpu, profile, wait):
    m = SmpMachine(cpus, profile).on(this_cpu)
    ran = []
    m.smp.on_each_cpu(lambda cpu: ran.append((cpu, m.current, m.cpu[cpu].rflags & IF)), wait)
    if not wait:
        assert ran == [(this_cpu, this_cpu, 0)]
        m.settle()
    assert sorted(ran) == [(cpu, cpu, 0) for cpu in range(cpus)]
    assert all(cpu.rflags & IF for cpu in m.cpu)
    assert [cpu for cpu, _ in m.sent()] == [cpu for cpu in range(cpus) if cpu != this_cpu]
    assert not m.warnings
    m.smp.validate()


@every_version
@pytest.mark.parametrize("cpus", CPUS)
def test_one_other_cpu_is_interrupted_by_the_single_vector_and_several_by_the_other(cpus, profile):
    m = SmpMachine(cpus, profile)
    m.smp.on_each_cpu(lambda cpu: None, True)
    vector = SINGLE if cpus == 2 else MANY
    assert m.sent() == [(cpu, vector) for cpu in range(1, cpus)]
    assert m.smp.counters.received == {(cpu, vector): 1 for cpu in range(1, cpus)}


@every_version
def test_a_cpu_with_calls_queued_already_gets_no_second_ipi(profile):
    m = SmpMachine(4, profile)
    ran = []
    m.cpu[2].rflags &= ~IF
    m.smp.on_each_cpu(lambda cpu: ran.append(("first", cpu)), False)
    m.on(1).smp.smp_call_function_single(2, lambda cpu: ran.append(("second", cpu)), False)
    m.on(3).smp.smp_call_function_single(2, lambda cpu: ran.append(("third", cpu)), False)
    assert [cpu for cpu, _ in m.sent()].count(2) == 1
    m.smp.validate()
    m.cpu[2].rflags |= IF
    m.settle()
    assert [what for what, cpu in ran if cpu == 2] == ["first", "second", "third"]
    assert m.cpu[2].taken == [MANY]


@pytest.mark.parametrize(("profile", "vector"), [(V6_12, SINGLE), (V6_1, SINGLE), (V5_4, MANY)])
def test_one_ipi_left_of_many_goes_by_the_single_vector_since_5_13(profile, vector):
    m = SmpMachine(3, profile)
    m.cpu[1].rflags &= ~IF
    m.on(2).smp.smp_call_function_single(1, lambda cpu: None, False)
    m.ipis.clear()
    m.on(0).smp.smp_call_function_many(range(3), lambda cpu: None, False)
    assert m.sent() == [(2, vector)]


@pytest.mark.parametrize(("profile", "order"), [(V6_12, "sync async"), (V6_1, "sync async"), (V5_4, "async sync")])
def test_calls_that_somebody_waits_for_run_first_since_5_8(profile, order):
    m = SmpMachine(3, profile)
    ran = []
    m.smp.smp_call_function_single(1, lambda cpu: ran.append("async"), False)
    m.on(2).smp.smp_call_function_single(1, lambda cpu: ran.append("sync"), True)
    assert ran == order.split()


@pytest.mark.parametrize(("profile", "first"), [(V6_12, 0), (V6_1, 0), (V5_4, 1)])
def test_the_local_call_runs_while_the_others_are_under_way_since_5_13(profile, first):
    m = SmpMachine(2, profile)
    ran = []
    m.smp.on_each_cpu(ran.append, True)
    assert ran[0] == first


@every_version
def test_a_cpu_with_interrupts_off_delays_the_acknowledgement(profile):
    m = SmpMachine(4, profile)
    m.cpu[3].rflags &= ~IF
    ran = []
    with pytest.raises(Deadlock):
        m.smp.smp_call_function(ran.append, True)
    assert ran == [1, 2] and m.cpu[3].pending == [MANY]
    m.cpu[3].rflags |= IF
    m.settle()
    assert ran == [1, 2, 3]


@every_version
def test_preemption_is_off_while_a_cpu_waits(profile):
    m = SmpMachine(2, profile)
    seen = []
    m.smp.on_each_cpu(lambda cpu: seen.append(m.preempt(0).preempt > 0), True)
    m.smp.smp_call_function_single(1, lambda cpu: seen.append(m.preempt(0).preempt > 0), True)
    assert seen == [True, True, True]
    assert m.preempt(0).count == m.preempt(1).count == 0


@every_version
def test_a_call_without_waiting_waits_for_the_one_before_it(profile):
    m = SmpMachine(2, profile)
    ran = []
    m.smp.smp_call_function_single(1, lambda cpu: ran.append("first"), False)
    assert ran == []
    m.smp.smp_call_function_single(1, lambda cpu: ran.append("second"), False)
    assert ran == ["first"]
    m.settle()
    assert ran == ["first", "second"]
    m.smp.validate()


@every_version
def test_a_call_to_this_cpu_is_made_at_once_without_an_ipi(profile):
    m = SmpMachine(2, profile).on(1)
    ran = []
    assert m.smp.smp_call_function_single(1, ran.append, False) == 0
    assert ran == [1] and m.ipis == []


@every_version
@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("cpu", [-1, 2, 99])
def test_a_cpu_that_is_not_online_is_enxio(profile, wait, cpu):
    m = SmpMachine(2, profile)
    assert m.smp.smp_call_function_single(cpu, pytest.fail, wait) == -errno.ENXIO
    m.smp.smp_call_function_many([cpu], pytest.fail, wait)
    m.smp.validate()


@every_version
def test_only_cpus_for_which_the_condition_holds_are_called(profile):
    m = SmpMachine(8, profile)
    ran = []
    m.smp.on_each_cpu_cond_mask(lambda cpu: cpu % 2 == 0, ran.append, True, range(1, 7))
    assert sorted(ran) == [2, 4, 6]
    ran.clear()
    m.smp.on_each_cpu_mask({0, 5, 7}, ran.append, True)
    assert sorted(ran) == [0, 5, 7]


@pytest.mark.parametrize(("profile", "waits"), [(V6_12, False), (V6_1, True), (V5_4, False)])
def test_6_1_waits_for_a_refused_cpu_that_is_still_busy_with_the_last_call(profile, waits):
    m = SmpMachine(3, profile)
    m.cpu[1].rflags &= ~IF
    m.smp.smp_call_function_many(range(3), lambda cpu: None, False)
    if waits:
        with pytest.raises(Deadlock):
            m.smp.on_each_cpu_cond_mask(lambda cpu: cpu == 2, lambda cpu: None, True, range(3))
    else:
        m.smp.on_each_cpu_cond_mask(lambda cpu: cpu == 2, lambda cpu: None, True, range(3))


CONTEXTS = {
    "task": 0, "bh disabled": SOFTIRQ_DISABLE_OFFSET, "softirq": SOFTIRQ_OFFSET, "hardirq": HARDIRQ_OFFSET, "nmi": NMI_OFFSET,
}


@every_version
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("irqs", [True, False])
def test_a_call_outside_of_task_context_or_with_interrupts_off_warns_once(profile, context, irqs):
    outside = context in ("softirq", "hardirq", "nmi")
    for single in (True, False):
        m = SmpMachine(2, profile)
        m.preempt(0).add(CONTEXTS[context])
        if not irqs:
            m.cpu[0].rflags &= ~IF
        for _ in range(2):
            if single:
                m.smp.smp_call_function_single(1, lambda cpu: None, True)
            else:
                m.smp.smp_call_function_many(range(2), lambda cpu: None, True)
        name = "smp_call_function_single" if single else "smp_call_function_many_cond"
        expected = ([f"{name}:irqs_disabled"] if single and not irqs else []) + ([name] if outside else [])
        if profile is V5_4 and not single:
            many = ([] if irqs else ["smp_call_function_many:irqs_disabled"]) + (["smp_call_function_many"] if outside else [])
            # One CPU in the mask: a call to a single CPU, which has warnings of its own.
            alone = ([] if irqs else ["smp_call_function_single:irqs_disabled"]) + (["smp_call_function_single"] if outside else [])
            expected = many + alone
        assert m.warnings == expected
        assert m.cpu[0].rflags & IF == (IF if irqs else 0)


@every_version
def test_an_oops_silences_the_warning_about_interrupts(profile):
    m = SmpMachine(2, profile)
    m.smp.oops_in_progress = lambda: True
    m.cpu[0].rflags &= ~IF
    m.smp.smp_call_function_single(1, lambda cpu: None, True)
    m.smp.smp_call_function_many(range(2), lambda cpu: None, True)
    assert m.warnings == []


@every_version
def test_a_callers_own_call_is_busy_until_its_cpu_takes_it(profile):
    m = SmpMachine(2, profile)
    ran = []
    csd = CallSingleData(lambda cpu: ran.append((cpu, csd.locked)))
    assert m.smp.smp_call_function_single_async(1, csd) == 0
    assert m.smp.smp_call_function_single_async(1, csd) == -errno.EBUSY
    m.settle()
    assert ran == [(1, False)]
    assert m.smp.smp_call_function_single_async(1, csd) == 0


def test_a_cpu_that_polls_in_its_idle_loop_gets_no_ipi():
    m = SmpMachine(2)
    m.smp.set_nr_if_polling = lambda cpu: True
    ran = []
    m.smp.smp_call_function_single(1, ran.append, False)
    assert m.ipis == [] and ran == []
    m.smp.validate()
    m.on(1).smp.flush_smp_call_function_queue(1)
    assert ran == [1]


@pytest.mark.parametrize("cpus", CPUS)
def test_ipis_and_calls_are_counted_by_cpu_and_cause(cpus):
    m = SmpMachine(cpus)
    for cpu in range(cpus):
        m.on(cpu).smp.on_each_cpu(lambda cpu: None, True, cause="__purge_vmap_area_lazy")
    assert m.smp.counters.sent_for("__purge_vmap_area_lazy") == len(m.ipis) == cpus * (cpus - 1)
    assert m.smp.counters.sent == {(cpu, "__purge_vmap_area_lazy"): cpus - 1 for cpu in range(cpus) if cpus > 1}
    assert m.smp.counters.run == m.smp.counters.sent


def test_validate_finds_a_call_that_nobody_told_its_cpu_of():
    m = SmpMachine(2)
    m.smp.on_each_cpu(lambda cpu: None, True)
    m.smp.call_single_queue[1].append(CallSingleData(locked=True))
    with pytest.raises(AssertionError, match="nobody told"):
        m.smp.validate()


@every_version
@pytest.mark.parametrize("seed", range(4))
def test_no_call_is_lost_or_made_twice_in_any_order_of_calls_and_interrupts(profile, seed):
    rng = random.Random(seed)
    m = SmpMachine(4, profile)
    asked, ran = [], []
    for number in range(300):
        m.current = rng.randrange(4)
        action = rng.randrange(5)
        if action == 0:
            cpu = rng.randrange(4)
            asked.append((number, cpu))
            m.smp.smp_call_function_single(cpu, lambda cpu, n=number: ran.append((n, cpu)), rng.random() < 0.5)
        elif action == 1:
            mask = rng.sample(range(4), rng.randrange(1, 5))
            asked += [(number, cpu) for cpu in mask]
            m.smp.on_each_cpu_mask(mask, lambda cpu, n=number: ran.append((n, cpu)), rng.random() < 0.5)
        else:
            m.take_interrupts(rng.randrange(4))
        m.smp.validate()
    m.settle()
    m.smp.validate()
    assert sorted(ran) == sorted(asked)
