"""A model of Linux's kernel mappings: page tables, page allocator, vmalloc, faults and oopses."""
