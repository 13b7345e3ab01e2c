# What can't be evaluated, each in its own way.
{ program }:
let
  numbers = builtins.genList (number: number) 65536;
  each = step: start: builtins.foldl' (sum: _: step sum) start numbers;
in
rec {
  # 65536^4 steps, which take neither stack nor memory.
  loops = program "loops" { version = toString (each (each (each (each (sum: sum + 1)))) 0); };
  # A list that gets twice as long again and again.
  eats = program "eats" { version = toString (builtins.length (builtins.foldl' (list: _: list ++ list) [ 1 ] numbers)); };
  recursion = program "recursion" { version = recursion.version; };
  # Each step waits for the next one's result.
  deep = program "deep" { version = let count = number: 1 + count (number + 1); in toString (count 0); };

  throws = throw "it was thrown";
  aborts = abort "it was aborted";
  wrong = program "wrong" { version = 1 + { }; };
}
