"""The settings of a run: one typed tree, read from TOML, with `--set section.key=value` laid over it.

The place of a setting says what a change of it means. In `identity` it is another run, in `exposure` the clients are
asked again, in `operation` the run goes on; `own` has each machine's own. `sections` and `trees` put them together as a
file has them, and `rules` holds settings of several sections to each other.

The server's tree (`ServerConfig`) is the run's. The part that both roles must agree on (`RunConfig`) travels to the
clients in the welcome. So nothing has to be kept equal by hand on two machines. A client's own tree (`ClientConfig`)
holds only what is its own: where the server is, who it is, and where its text lies.
"""
