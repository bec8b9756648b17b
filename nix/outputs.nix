# What the flake gives for one system and accelerator: a package, an app, a development shell and
# checks. All of them run Python without the packages and settings of the user and the system.
{
  lib,
  pkgs,
  # The virtual environments of python.nix.
  environments,
  accelerator,
  # The whole repository, for the tests.
  source,
}:
let
  isolated = {
    PYTHONNOUSERSITE = "1"; # no packages from the home folder
  };
  leave = [
    "PYTHONHOME"
    "PYTHONPATH"
  ];
  assign = lib.mapAttrsToList (name: value: "--set ${name} ${value}") isolated;
  unset = map (name: "--unset ${name}") leave;

  package =
    pkgs.runCommand "onewan-${accelerator}-${environments.version}"
      {
        nativeBuildInputs = [ pkgs.makeWrapper ];
        meta = {
          description = "Trainer for the Wan 2.2 video models";
          license = lib.licenses.asl20;
          mainProgram = "onewan";
        };
      }
      ''
        makeWrapper ${environments.users}/bin/onewan $out/bin/onewan \
          ${lib.concatStringsSep " " (assign ++ unset)}
      '';

  tests =
    pkgs.runCommand "onewan-tests"
      (
        isolated
        // {
          nativeBuildInputs = [ environments.tests ];
          OMP_NUM_THREADS = "1";
        }
      )
      ''
        unset ${lib.concatStringsSep " " leave}
        export HOME="$TMPDIR"
        cp -r ${source} source
        chmod -R u+w source
        cd source
        python -m pytest -q -p no:cacheprovider --numprocesses "$NIX_BUILD_CORES" -m "not long" \
          tests/unit tests/formats tests/golden tests/importing
        touch $out
      '';

  # The installed program trains and samples, from a folder without the sources.
  demo = pkgs.runCommand "onewan-demo" { } ''
    export HOME="$TMPDIR"
    ${lib.getExe package} demo --dir demo
    touch $out
  '';
in
{
  inherit package;
  app = {
    type = "app";
    program = lib.getExe package;
    meta.description = "onewan with PyTorch for ${accelerator}";
  };
  shell = pkgs.mkShell {
    name = "onewan-${accelerator}";
    packages = [
      environments.editable
      pkgs.git
    ];
    env = isolated;
    # REPO_ROOT is where the editable onewan is imported from.
    shellHook = ''
      unset ${lib.concatStringsSep " " leave}
      export REPO_ROOT="$(git rev-parse --show-toplevel)"
    '';
  };
  checks = {
    inherit package tests demo;
  };
}
