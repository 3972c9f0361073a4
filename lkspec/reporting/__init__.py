"""Tables and figures of many runs: read run folders, compare them in pairs, lay the result out, render it.

``counts`` reads run folders into counts per prompt, ``intervals`` turns counts into estimates, ``layout`` arranges them
in a table, ``renderers`` write it. Notebooks and ``lkspec report`` use the same functions. What commands print goes
through ``terminal``.
"""
