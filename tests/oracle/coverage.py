"""Which test reproduces which kind of recorded fact, and why some kinds need none.

Keys are (folder, file pattern, command, kind of record): for facts the `cmd` and `t` of a record, the number that 6.12 appends to
busy and lazy lists left out; for other folders command and kind are "". Patterns are shell patterns of the file's name without
its suffixes. The first row that fits counts. A value names tests as file::function, or begins with "none:" and says why.
"""

from __future__ import annotations

SESSION = "tests/oracle/test_sessions.py::test_every_call_of_a_session_has_its_recorded_outcome"
VMALLOCINFO = "tests/oracle/test_sessions.py::test_vmallocinfo_prints_the_recorded_text_after_a_session"
BOOT_ROWS = "tests/oracle/test_sessions.py::test_every_row_of_boot_is_printed_from_what_it_says"
CALLS = "tests/kernel/test_vmalloc_facts.py::test_every_recorded_call_makes_the_recorded_area_and_leaves"
SET_MEMORY = "tests/kernel/test_set_memory.py::test_set_memory_ro_and_rw_write_the_recorded_entries"
IOREMAP = "tests/kernel/test_ioremap.py::test_every_recorded_ioremap_makes_the_recorded_area_and_leaves"
MEMREMAP = "tests/kernel/test_ioremap.py::test_memremap_of_ram_is_its_recorded_address_in_the_direct_map"
FORTIFY = "tests/oracle/test_fortify.py::test_a_fortified_memset_beyond_its_buffer_is_refused_as_recorded"
LAYOUT = "tests/oracle/test_layout_facts.py"
PTDUMP = "tests/oracle/test_recorded_leaf_runs.py::test_every_run_of_the_vmalloc_region_and_of_modules_dumps_as_it_was_mapped"
ERRORS = "tests/oracle/test_errors.py"
FAULTS = "tests/oracle/test_fault_facts.py::test_a_provoked_fault_has_the_recorded_error_code_and_place"
HARMLESS = "tests/oracle/test_fault_facts.py::test_what_did_not_fault_there_does_not_fault_here"
STALE_FACTS = "tests/oracle/test_stale_facts.py"
STALE = "tests/oracle/test_fault_facts.py::test_a_stale_entry_is_read_through_as_recorded"
PURGED = "tests/oracle/test_fault_facts.py::test_after_vm_unmap_aliases_the_read_faults_as_recorded"
OOPS = "tests/kernel/test_oops.py::test_every_recorded_report_is_printed_line_for_line"
EXCEPTION = "tests/kernel/test_fault.py::test_every_recorded_oops_follows_from_its_exception"
REPLAY = "tests/kernel/test_replay.py::test_a_recorded_trace_replays_with_every_address_and_the_final_tree"
MARKS = "none: the marker that a dump begins or ends, without a fact of its own"

COVERED: dict[tuple[str, str, str, str], str] = {
    ("facts", "*", "None", "syms"): "none: which private symbols the recorder found in its kernel, no fact of the kernel",
    # Layout
    ("facts", "*", "layout", "layout"): f"{LAYOUT}::test_the_address_map_is_the_recorded_one_and_kaslr_moves_only_three_bases",
    ("facts", "*", "layout", "cr"): f"{LAYOUT}::test_control_registers_are_the_recorded_ones_but_for_xsave",
    ("facts", "*", "layout", "consts"): f"{LAYOUT}::test_constants_and_flags_are_the_recorded_ones",
    ("facts", "*", "layout", "flags"): f"{LAYOUT}::test_constants_and_flags_are_the_recorded_ones",
    ("facts", "*", "layout", "pgd_run"): f"{LAYOUT}::test_top_tables_are_populated_as_recorded",
    ("facts", "*", "layout", "pgd_vmalloc"): f"{LAYOUT}::test_top_tables_are_populated_as_recorded",
    ("facts", "*", "layout", "prealloc"): f"{LAYOUT}::test_top_tables_are_populated_as_recorded",
    ("facts", "*", "layout", "walk"): f"{LAYOUT}::test_every_recorded_walk_finds_entries_with_the_recorded_flags",
    ("facts", "pti-*", "layout", "user_pgd"): (
        f"{LAYOUT}::test_the_user_half_s_table_has_the_recorded_kernel_entries_and_none_of_vmalloc"
    ),
    # The whole session of a main recording, absolute addresses included
    ("facts", "*", "*", "dump_end"): MARKS,
    ("facts", "*", "*", "nodes"): f"{LAYOUT}::test_constants_and_flags_are_the_recorded_ones",
    ("facts", "main-*", "hold", "hold"): VMALLOCINFO,
    ("facts", "*", "*", "delta"): "none: the distance of two addresses that are compared themselves",
    ("facts", "*", "basic", "pfn"): "none: frames that this boot's page allocator happened to have free",
    ("facts", "*", "vmap", "vmap_alias"): "tests/ledger/test_vmalloc_areas.py::test_C48_two_vmaps_of_one_page_alias_it",
    ("facts", "*", "deferred", "vfree_ctx_imm"): "none: whether a worker had run by the time the recorder looked again; both occur",
    ("facts", "*", "ioremap", "memremap"): MEMREMAP,
    ("facts", "main-*", "*", "*"): SESSION,
    # The same commands under other boot options: relative, as there is no dump to start from
    ("facts", "pti-*", "basic", "*"): CALLS,
    ("facts", "nohugevmalloc-*", "huge", "split*"): (
        "none: without large leaves set_memory changes a 4 KiB entry, which the set_memory records of main-* compare"
    ),
    ("facts", "nohugevmalloc-*", "huge", "set_memory"): SET_MEMORY,
    ("facts", "nohugevmalloc-*", "huge", "huge_seq"): "none: addresses of a boot without a dump; the calls themselves are compared",
    ("facts", "nohugevmalloc-*", "variants", "kvmalloc*"): "none: addresses of a boot without a dump; main-* has the same calls",
    ("facts", "nohugevmalloc-*", "*", "*"): CALLS,
    ("facts", "nogb-*", "ioremap", "*"): IOREMAP,
    ("facts", "nohugeiomap-*", "ioremap", "*"): IOREMAP,
    ("facts", "stale-*", "reuse", "reuse"): f"{STALE_FACTS}::test_a_freed_address_comes_back_as_recorded_after_the_purge_only",
    ("facts", "stale-*", "reuse", "lazy3"): (
        f"{STALE_FACTS}::test_a_free_far_above_the_threshold_is_drained_before_the_array_of_its_pages_becomes_lazy"
    ),
    ("facts", "stale-*", "reuse", "lazy*"): (
        f"{STALE_FACTS}::test_the_lazy_areas_are_drained_at_the_recorded_free_above_the_threshold_by_the_worker"
    ),
    ("facts", "stale-*", "reuse", "nr_vmalloc_pages"): (
        f"{STALE_FACTS}::test_nr_vmalloc_pages_counts_what_is_allocated_by_any_cpu_as_recorded"
    ),
    ("facts", "ptdump-*", "hold", "hold"): "none: the hold command of main-* in another boot; its leaves are among the dumped runs",
    ("facts", "ptdump-*", "ptdump", "pt"): PTDUMP,
    ("facts", "ptdump-*", "ptdump", "ptdump_end"): MARKS,
    # Errors
    ("facts", "errors2-*", "errors2", "err"): f"{ERRORS}::test_a_refused_request_says_what_the_recorded_one_said",
    ("facts", "errors2-*", "errors2", "nested*"): f"{ERRORS}::test_the_array_of_more_than_512_pages_is_an_area_of_its_own",
    ("facts", "errors2-*", "fault vmalloc_atomic_ctx", "fault"): f"{ERRORS}::test_with_preemption_off_vmalloc_just_succeeds",
    ("facts", "faults-*", "errors", "err"): f"{ERRORS}::test_every_recorded_error_has_its_result",
    # Faults
    ("facts", "faults-*", "fault exec_ok", "fault"): HARMLESS,
    ("facts", "faults-*", "fault memset_over", "fault"): FORTIFY,
    ("facts", "faults-*", "fault noncanon*", "fault"): EXCEPTION,
    ("facts", "faults-*", "fault stack*", "fault"): EXCEPTION,
    ("facts", "faults-*", "fault *", "fault"): FAULTS,
    ("facts", "stale-*", "fault stale_tlb_purged", "fault"): PURGED,
    ("facts", "stale-*", "fault stale_*", "fault"): STALE,
    ("facts", "stale-*", "fault vmap_block_hole", "fault"): PURGED,
    ("facts", "stale-*", "fault vmalloc_gfp_hi", "*"): HARMLESS,
    # Texts
    ("messages", "errors2-*", "", ""): f"{ERRORS}::test_a_refused_request_says_what_the_recorded_one_said",
    ("messages", "*", "", ""): OOPS,
    ("vmallocinfo", "*.after-hold", "", ""): VMALLOCINFO,
    ("vmallocinfo", "*.boot", "", ""): BOOT_ROWS,
    ("vmallocinfo", "*.kallsyms", "", ""): "none: addresses of one build's functions, for reading the texts beside it",
    # Traces
    ("seq", "*", "", ""): REPLAY,
    ("kconfig", "*", "", ""): "tests/oracle/test_coverage.py::test_the_profiles_are_built_as_the_recorded_configurations_say",
}
