"""Guest programs: directives, assembly, compilation, relocatable ELF and linking."""
