{
  description = "As much of pyproject.nix as onewan's flake needs to be evaluated";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs";

  outputs =
    { nixpkgs, ... }:
    let
      inherit (nixpkgs) lib;

      # The name of a requirement, such as "torch>=2.6", and its extras.
      parse =
        requirement:
        let
          parts = builtins.match "([A-Za-z0-9._-]+)(\\[([a-z0-9,]+)])?.*" requirement;
          named = builtins.elemAt parts 2;
        in
        {
          name = builtins.replaceStrings [ "_" "." ] [ "-" "-" ] (builtins.head parts);
          value = if named == null then [ ] else lib.splitString "," named;
        };
      # name -> extras, where several requirements may name one package.
      spec =
        requirements:
        builtins.mapAttrs (_: builtins.concatMap (one: one.value)) (
          builtins.groupBy (one: one.name) (map parse requirements)
        );

      render =
        { project, environ, ... }:
        { resolveBuildSystem, ... }:
        let
          metadata = project.pyproject.project;
        in
        assert environ ? python_version;
        {
          pname = metadata.name;
          inherit (metadata) version;
          nativeBuildInputs = resolveBuildSystem (spec project.pyproject.build-system.requires);
          passthru = {
            dependencies = spec metadata.dependencies;
            optional-dependencies = builtins.mapAttrs (_: spec) metadata.optional-dependencies;
          };
        };

      # All packages that those in `wanted` need, with the extras that are asked for.
      closure =
        set: wanted:
        let
          # One key for each package, NAME@, and one for each extra of it, NAME@EXTRA.
          keysOf =
            dependencies:
            builtins.concatMap (
              name: map (extra: { key = "${name}@${extra}"; }) ([ "" ] ++ dependencies.${name})
            ) (builtins.attrNames dependencies);
          nameIn = key: builtins.head (lib.splitString "@" key);
          extraIn = key: builtins.elemAt (lib.splitString "@" key) 1;
          needs =
            { key }:
            let
              inherit (set.${nameIn key}) passthru;
            in
            keysOf (
              if extraIn key == "" then
                passthru.dependencies or { }
              else
                passthru.optional-dependencies.${extraIn key}
            );
          found = builtins.genericClosure {
            startSet = keysOf wanted;
            operator = needs;
          };
        in
        map (one: set.${nameIn one.key}) (builtins.filter (one: extraIn one.key == "") found);
    in
    {
      lib = {
        pep508.mkEnviron = python: { python_version = python.pythonVersion; };
        project.loadPyproject =
          { projectRoot }: { pyproject = lib.importTOML (projectRoot + "/pyproject.toml"); };
      };

      build = {
        lib.renderers = {
          mkDerivation = render;
          mkDerivationEditable =
            { root, ... }@arguments: hooks: render arguments hooks // { EDITABLE_ROOT = root; };
        };

        packages =
          { stdenv, newScope, python }:
          let
            hook =
              name:
              stdenv.mkDerivation {
                pname = name;
                version = "1";
                inherit python;
              };
            scope =
              overlay:
              let
                base = {
                  inherit stdenv;
                  pyprojectHook = hook "pyproject-hook";
                  pyprojectWheelHook = hook "pyproject-wheel-hook";
                  pyprojectEditableHook = hook "pyproject-editable-hook";
                  resolveBuildSystem = closure final;
                  callPackage = newScope final;
                  mkVirtualEnv =
                    name: wanted:
                    stdenv.mkDerivation {
                      inherit name;
                      packages = closure final wanted;
                    };
                  overrideScope = scope;
                };
                final = base // overlay final base;
              in
              final;
          in
          scope (_: _: { });

        hacks =
          { stdenv }:
          {
            nixpkgsPrebuilt =
              {
                from,
                prev ? {
                  passthru = { };
                },
              }:
              stdenv.mkDerivation {
                inherit (from) pname version;
                inherit (prev) passthru;
                inherit from;
              };
          };
      };
    };
}
