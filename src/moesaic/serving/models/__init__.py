"""Many whole models on one machine: a model is the cached object, requests are grouped by model.

Card serving-and-scale.md, "SN40L / Samba-CoE: three memory tiers, model switching" (arXiv 2405.07518): keep all models in
large slow memory, the active ones in fast memory; what matters is how often a model has to be switched. `residency` says
which models are in a tier (with the cache policies of the replay), `cache` moves them, `queue` orders requests, `simulate`
tells the time before anything is loaded, and `http` serves them behind one address.
"""
