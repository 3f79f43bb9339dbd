"""Cache policies: which experts stay near, which are fetched ahead, where a miss runs. One file, one policy.

A policy is an object with its state in NumPy arrays, which a live engine and the replay drive alike:

    policy = registry.get("policies", "lru").build()
    policy.start(shape, capacity_bytes, hardware)       # an empty cache
    policy.begin_step(fresh=True)                       # a forward pass; fresh: a request begins
    decision = policy.event(layer, experts, tokens)     # its router chose: hits, loads, what leaves, what the host runs
    fetches = policy.prefetch(budget_bytes)             # then, while the link idles: what to fetch next, best first
    policy.arrived(layer, expert)                       # a prefetched expert can be used

What all keep: experts of the event in progress are pinned (Belady's bound alone forgets them as soon as it ends); prefetch
never evicts what this pass used; a capacity too small for one layer's demand streams the rest through; capacity is in
bytes. The compiled functions under `event` and `prefetch` are those that the replay's loop runs.
"""
