"""Print the tables of config/README.md: all keys, and all names that a registry has."""

from oacore.config.explain import describe_fields, describe_names

print("| key | default | meaning |\n|---|---|---|")
for row in describe_fields():
    print("| `{}` | {} | {} |".format(*row))
print("\n## All names\n\n| key | name | what |\n|---|---|---|")
for row in describe_names():
    print("| `{}` | `{}` | {} |".format(*row))
