"""PEFT's own tests, run against `JactusConfig`.

PEFT tests each of its methods with one big suite: save and load, merge, disable, delete, several adapters, data types,
gradient checkpointing, generation, ... Passing it is what "works like every PEFT method" means. The suite is not part
of the installed package, but of its source distribution; `scripts/setup.sh` puts that of the *installed* version into
`.cache/`. Nothing of it is copied into this repository:

* `upstream.py` imports the test classes and replaces the method under test in their `parametrize` marks;
* `rows.py` lists the configurations, and the tests each of them contradicts by design (strict xfails);
* `tiny_hub.py` builds random stand-ins for the tiny models that the tests would download;
* `test_contract.py` is the table that puts them together.
"""
